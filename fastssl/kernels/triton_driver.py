"""What Triton needs on this machine besides a GPU."""


def why_no_launches() -> str:
    """Return why Triton cannot launch kernels, "" if it can.

    Before the first launch, Triton compiles a small library in C. Images for deployment often have no compiler, and the
    first call of an op would end with an error.
    """
    try:
        from triton.backends.nvidia.driver import CudaUtils
    except ImportError:  # another version of Triton does this elsewhere
        return ""
    try:
        CudaUtils()
    except Exception as error:  # of any kind: no compiler, no header, no driver
        reason = str(error).partition("\n")[0]
        return f"Triton cannot launch kernels ({reason}); install a C compiler and the header files of Python"
    return ""
