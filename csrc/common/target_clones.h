// FASTSSL_TARGET_CLONES before a function: the compiler makes versions of it for newer instruction sets, and the loader
// picks one when the module is loaded. So a wheel built anywhere runs anywhere and still uses what the machine has.
//
// Only the function itself is cloned: lambdas inside it and functions it calls without inlining them are not. A loop
// that runs under `parallel_for` therefore goes into a function of its own.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTSSL_TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSSL_TARGET_CLONES
#endif
