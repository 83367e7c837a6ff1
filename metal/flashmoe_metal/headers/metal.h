// Defines the words that the bodies use and Metal lacks.

/// Writes nothing, because the host can read the GPU's memory. See cuda.h.
METAL_FUNC void post(ulong, uint, uint) {}
