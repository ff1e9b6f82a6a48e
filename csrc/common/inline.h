// Marks functions that must be inlined, so that they are compiled for the instruction set of their caller (isa.h).
#pragma once

#define FASTSSL_INLINE inline __attribute__((always_inline))
