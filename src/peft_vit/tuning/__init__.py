"""From a folder of images and limits to the smallest model that is shown to be good enough."""
