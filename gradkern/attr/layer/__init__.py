"""Methods that attribute to a layer, or start at a neuron."""
