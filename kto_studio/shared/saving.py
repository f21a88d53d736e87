"""A text that the server made becomes a file on the user's machine."""


def save_as(name: str, kind: str) -> str:
    """JavaScript for an event's ``js``: it saves the event's text, if there is any, as ``name`` of this MIME type."""
    return f"""text => {{
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {{type: '{kind}'}}));
  link.download = '{name}';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}}"""
