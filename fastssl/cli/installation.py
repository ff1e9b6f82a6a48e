"""Check that the installed `fastssl` is this project, whose distribution is called `fastssl-speech`."""

from importlib import metadata


def stranger_of_the_same_name() -> str | None:
    """Return a warning if the distribution `fastssl`, which is another project, is installed; else None.

    Both projects have a package `fastssl`, so files of one replace files of the other.
    """
    try:
        version = metadata.version("fastssl")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"warning: the distribution fastssl {version} is also installed, but it is not this project (fastssl-speech); "
        "run `pip uninstall fastssl`, then install this project again from its clone or wheel"
    )
