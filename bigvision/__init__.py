"""bigvision: CNNs that outgrow a device, by their activations or by their class count."""

from importlib.metadata import version

__version__ = version("bigvision")
