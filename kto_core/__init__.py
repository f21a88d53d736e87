"""The library behind KTO Studio: data, presets, training, chat and export. Never imports gradio."""

__version__ = "0.1.0"
