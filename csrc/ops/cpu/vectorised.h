// Functions that are compiled once for each instruction set; the right one is chosen when the library is loaded.
#pragma once

// ThreadSanitizer instruments the choice as well, which a program makes before its runtime is there.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define FASTSSL_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSSL_VECTORISED  // aarch64 has its vectors in the baseline; clang on x86 stays at SSE2 here
#endif
