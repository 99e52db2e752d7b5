"""Text, tokenizers and folders of weights: what is read from files. Nothing here knows the method."""


def need(package, purpose):
    """An optional package, imported where it is used; ModuleNotFoundError with the command that installs it."""
    try:
        return __import__(package)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{purpose} needs the package {package}: pip install {package}") from None


def read_bytes(file, largest):
    """The content of a file; OSError and, if there are more than `largest` bytes, ValueError, which name the file."""
    try:
        with open(file, "rb") as f:
            content = f.read(largest + 1)
    except OSError as e:
        raise OSError(f"{file}: {e.strerror}") from None  # where reading fails, Python's own does not name it
    if len(content) > largest:
        raise ValueError(f"{file}: more than {largest:,} bytes")
    return content
