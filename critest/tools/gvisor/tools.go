//go:build tools

// Package tools names the program that this module pins: gVisor's OCI runtime.
package tools

import _ "gvisor.dev/gvisor/runsc"
