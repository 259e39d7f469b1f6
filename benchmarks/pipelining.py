"""Whether Triton's pipelined loops copy over what a product still reads: a race that no sanitizer sees.

On Hopper a product (wgmma) runs on while the loop begins to copy a later tile to shared memory. Triton plans one buffer
more for tiles that such a product reads, but (3.6 to 3.8) not if registers read them as well; then the copy goes to the
buffer that is being read, and gradients are off by some percent, more or less in each run.
"""

import re

BUFFERS = re.compile(r"(%[\w#]+) = ttg\.memdesc_index (%[\w#]+)\[.*: !ttg\.memdesc<(\d+)x")
SAME = re.compile(r"(%[\w#]+) = ttg\.memdesc_(?:trans|reinterpret|subslice) (%[\w#]+)")
PRODUCT = re.compile(r"= ttng\.warp_group_dot (%[\w#]+), (%[\w#]+), .*isAsync = true")
WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")
COPY = re.compile(r"= ttg\.async_copy_global_to_local [^,]+, (%[\w#]+)")


def early_copies(ttgir: str, stages: int) -> list[str]:
    """Tiles that are overwritten while a product reads them.

    Args:
        ttgir: a kernel in Triton's GPU dialect, as ``compiled.asm["ttgir"]`` has it.
        stages: of its loops: a copy is made for the tile so many steps ahead, less one.

    Returns:
        A sentence for each such copy.
    """
    views: dict[str, tuple[str, int]] = {}  # what a name is a part of, and how many buffers that has
    products: list[set[str]] = []  # under way, with the buffers they read
    found = []
    for line in ttgir.splitlines():
        if "scf.for" in line:
            products = []
        elif match := BUFFERS.search(line):
            views[match[1]] = (match[2], int(match[3]))
        elif (match := SAME.search(line)) and match[2] in views:
            views[match[1]] = views[match[2]]
        elif match := PRODUCT.search(line):
            products.append({views[name][0] for name in match.groups() if name in views})
        elif match := WAIT.search(line):
            products = products[len(products) - min(int(match[1]), len(products)) :]
        elif (match := COPY.search(line)) and match[1] in views:
            tile, buffers = views[match[1]]
            if buffers < stages and any(tile in product for product in products):
                found.append(f"{tile} has {buffers} buffers for {stages} stages, and a product reads the one copied to")
    return found
