"""From a folder of images to a model: `train` makes one, `tune` finds the best."""
