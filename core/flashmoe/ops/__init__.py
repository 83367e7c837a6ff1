"""The maths of a layer, once for each device."""
