"""The errors jaxquant raises on bad input: one line, what came, what is allowed, what to do."""


class JaxquantError(ValueError):
    """Bad input that the caller can mend; the message names the file, tensor or field."""


class CheckpointError(JaxquantError):
    """A checkpoint that cannot be read or written as asked."""
