"""The Gradio app over `kto_core`: one file a tab, `views.py` for what is shown, `launch.py` for build and launch."""
