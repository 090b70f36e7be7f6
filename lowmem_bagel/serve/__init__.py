"""BAGEL behind one port: a queue before one pipeline, an HTTP API, and a page.

`service` is what all of it talks to; `worker` owns the pipeline; routes and page know neither torch nor the device.
"""
