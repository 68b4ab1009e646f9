"""A network that may become narrow, and the recipe of a run that makes it so."""

NET = """
from torch import nn

def make(num_labels):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 8), nn.GELU(),
        nn.Linear(8, num_labels),
    )
"""
METHOD = 'name = "vrpge"\nkeep = 0.4\nstructure_lr = 0.2\nheld_out = 0.1\nfinetune = 0.2'
RECIPE = """
[model]
callable = "narrow_net:make"
head = ["13.*"]

[data]
task = "image-classification"
npz = "{images}"

[method]
METHOD

[optimizer]
lr = 0.05

[run]
epochs = 5
batch_size = 10
log_every = 1
output = "out"
device = "cpu"
""".lstrip().replace("METHOD", METHOD)
