"""Trained classifiers outside of training: opening weight files, model cards, ONNX."""
