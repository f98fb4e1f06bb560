//go:build tools

// Package tools names the program that this module pins: runc, newer than the one Debian 12 has.
package tools

import _ "github.com/opencontainers/runc"
