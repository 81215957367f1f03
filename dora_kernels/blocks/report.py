"""A model's blocks in words."""


def block_lines(blocks: dict[str, str | None]) -> list[str]:
    """One line for each module that is a block, or nearly one."""
    return [
        f"{path or 'model'}: {'one block' if reason is None else f'not a block: {reason}'}"
        for path, reason in blocks.items()
    ]
