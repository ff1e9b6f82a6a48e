"""Whether the installed `fastssl` is this project: its distribution is `fastssl-speech`."""

from importlib import metadata


def stranger_of_the_same_name() -> str | None:
    """A warning where the distribution `fastssl` is installed, which is another project; None where it is not.

    Both have a package of this name, so that files of one replace those of the other.
    """
    try:
        version = metadata.version("fastssl")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"warning: the distribution fastssl {version} is installed too, and is not this project (fastssl-speech): run "
        "`pip uninstall fastssl`, then install this project again from its clone or wheel"
    )
