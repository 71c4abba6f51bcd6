"""Stage three: class and explanation on the device, with numpy and one inference engine."""
