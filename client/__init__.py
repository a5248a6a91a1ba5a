"""A data owner's side: its teacher, its policy, and its answers. Never imports the server."""
