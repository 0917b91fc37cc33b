"""The pipeline from `book/*.md` to executed notebooks and the site; not part of the library."""
