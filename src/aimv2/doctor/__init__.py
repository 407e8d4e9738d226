"""`aimv2 doctor`: check versions, devices, kernels, network, disks and a tiny training run on this machine."""
