"""What the tests share: a text and its tokens, tiny models, tiny runs, and runs in processes that can be killed.

Each thing is made once in a session and is read only: copy it before altering it.
"""
