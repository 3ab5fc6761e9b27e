"""`interceptor run`: one command in a network namespace of its own, its connections captured and dialled from outside."""
