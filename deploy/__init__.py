"""How the parts are put together: simulation, processes, provisioning. The only place that knows both sides."""
