"""The plan `paper` with a tiny classifier on tiny images: does the chain work on this machine?"""

from experiments.plan import Contrast, Plan
from experiments.plans.paper import arms

IMAGES = "--batch-size 16 --train-crop-size 32 --val-resize-size 36 --val-crop-size 32"
MASK = "--policy-model test_resnet --grid 8 --kernel 3 --sigma 1"

PLAN = Plan(
    name="paper_trial",
    question="Do all commands of the plan `paper` work on this machine? The results mean nothing.",
    arms=arms("test_resnet", epochs=3, fine_tuning_epochs=1, images=IMAGES, mask=MASK),
    baseline="test_resnet-conventional",
    primary=(Contrast("method", "test_resnet-published", "test_resnet-conventional"),),
    hard="*",
)
