"""Parts of the ``dynalay`` benchmark."""
