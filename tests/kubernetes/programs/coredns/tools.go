//go:build tools

// Package tools names the program that this module pins: the name server of a Kubernetes cluster.
package tools

import _ "github.com/coredns/coredns"
