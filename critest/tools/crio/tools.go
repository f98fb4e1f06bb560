//go:build tools

// Package tools names the program that this module pins: CRI-O, a peer that times are compared with.
package tools

import _ "github.com/cri-o/cri-o/cmd/crio"
