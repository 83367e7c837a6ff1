// What Metal lacks of the words that the bodies use.

/// The host sees the memory of the GPU: see cuda.h.
METAL_FUNC void post(ulong, uint, uint) {}
