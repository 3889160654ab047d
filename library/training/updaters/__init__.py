"""How gradients become changed weights. The loop asks the Updater of the run and does not know which it is."""
