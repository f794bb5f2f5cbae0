"""Where and how tensors are computed: devices, precision, generators, schedules. No model and no file lives here."""
