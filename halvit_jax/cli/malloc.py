"""The C library's allocator, tuned for arrays: freed memory is kept for the next step, not returned to the kernel.

XLA on a CPU allocates and frees its temporaries in every step. By default glibc returns large blocks to the kernel at
once, and the next step pays for fresh pages, which costs up to half of its time. On a machine with an accelerator the
arrays do not live in this memory, and one arena for all threads would slow the input pipeline, so there nothing is set.
"""

import ctypes
import glob
import platform

ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")

# glibc's mallopt parameters, from malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Set the allocator; call before jax or TensorFlow start their threads. False if it is left unchanged."""
    if platform.libc_ver()[0] != "glibc" or any(glob.glob(pattern) for pattern in ACCELERATORS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Never unmap a block, never trim the heap, and one heap for all threads, because only the main arena
    # honours these settings.
    settings = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, ARENA_MAX: 1}
    done = [mallopt(name, value) for name, value in settings.items()]
    return all(done)
