"""Base models, ControlNets, pre-training, and metrics of images."""
