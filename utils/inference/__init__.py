"""Trained weights on their way out: classifiers, model cards, ONNX."""
