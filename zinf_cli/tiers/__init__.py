"""Where bytes lie: device, CPU and NVMe behind one protocol."""
