"""ResNet-18 end to end: a training step without selection, with naive PyTorch's, and with ours."""
