"""The Gradio app over `kto_core`: a package for each tab; `launch.py` builds the page and serves it."""

import kto_core  # noqa: F401 - before gradio: it switches the statistics of libraries off
