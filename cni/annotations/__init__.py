"""What a pod's objects in the API say about its capture: our own annotations, and those of meshes whose sidecars it may run.

Pure. Each mesh is one module: `read(view)` gives what its annotations mean in our options, or why the pod is left alone.
"""
