"""Per-sample gradient norms: ours, the peers and the models they are measured on."""
