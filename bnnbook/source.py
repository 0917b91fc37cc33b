"""The library's own text, shown in a chapter, so that nothing is typed twice."""

import inspect


def show(*objects) -> None:
    """Display the source of functions or classes as highlighted code in a notebook."""
    from IPython.display import Markdown, display

    text = "\n\n".join(inspect.getsource(each).rstrip() for each in objects)
    display(Markdown(f"```python\n{text}\n```"))
