"""The HTTP server: settings, keys, routes, metrics and the playground page. Needs the extra `serve`."""
