// Functions that must become part of their caller, so that they are compiled for the caller's instruction set (isa.h).
#pragma once

#define FASTSSL_INLINE inline __attribute__((always_inline))
