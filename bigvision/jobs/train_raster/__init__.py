"""Train a network on labelled scenes: random crops, or whole scenes with exact gradients."""

from bigvision.jobs.train_raster.job import TrainingResult, train
from bigvision.jobs.train_raster.options import TrainOptions

__all__ = ["TrainOptions", "TrainingResult", "train"]
