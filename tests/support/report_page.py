# SPDX-License-Identifier: Apache-2.0
"""What a report's tests share: parsed pages, and samples."""

import html.parser

import numpy as np

from contrastive.report import page

HOSTILE = "</script><img src=x onerror=\"alert('&amp;')\">\t\n\udcff"
_VOID = {"meta", "img", "br", "link", "input"}
RUN = {
    "command": ["/anywhere/run.py", "--dataset=a folder/", f"--x={HOSTILE}"],
    "flags": {"dataset": "a folder/", "seed": 0, "objective": "simclr"},
    "sources": {
        "dataset": "command line",
        "seed": "default",
        "objective": "preset",
    },
    "versions": {"python": "3.11"},
    "commit": "c0ffee",
    "devices": ["CPU:0"],
}


class Page(html.parser.HTMLParser):
    """Checks that elements nest; collects them and their text."""

    def __init__(self, text):
        super().__init__()
        self._open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self._open
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attributes):
        """Collects an element."""
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        """Checks that the innermost element is closed."""
        assert self._open.pop() == tag

    def handle_data(self, text):
        """Collects text that is shown."""
        if self._open[-1:] not in (["style"], ["script"]):
            self.texts.append(text)

    def all(self, tag):
        """Returns the attributes of all elements with a tag."""
        return [attributes for name, attributes in self.elements if name == tag]


def make_sample(num_classes=3, count=60, labelled=True, name="class"):
    """Images whose embeddings are near the axis of their class."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % num_classes
    noise = 0.1 * random.normal(size=(count, num_classes))
    return page.Sample(
        images=random.integers(0, 256, (count, 8, 8, 3), np.uint8),
        embeddings=(np.eye(num_classes)[labels] + noise).astype(np.float32),
        labels=labels if labelled else np.full(count, -1),
        names=[f"{name} {i}" for i in range(count)],
        class_names=[f"{name} {i}" for i in range(num_classes)] if labelled else (),
    )
