// The clients of Kubernetes against the streaming server: what kubectl and crictl link, not an imitation of it.
//
// Its argument is JSON: the URLs that the server offered, by the name of the case, and what else the cases need.
// It prints a line for each case and exits with 1 if one failed.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/apimachinery/pkg/util/proxy"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
	streaming "k8s.io/streaming/pkg/httpstream"
)

type input struct {
	URLs         map[string]string
	CA           string // PEM
	EchoPort     int
	CountPort    int
	ClosedPort   int
	OutputLength int
}

var given input

func main() {
	if err := json.Unmarshal([]byte(os.Args[1]), &given); err != nil {
		panic(err)
	}
	failed := false
	for _, c := range cases() {
		if err := c.run(); err != nil {
			failed = true
			fmt.Printf("FAILED %s: %v\n", c.name, err)
		} else {
			fmt.Printf("ok %s\n", c.name)
		}
	}
	if failed {
		os.Exit(1)
	}
}

type testCase struct {
	name string
	run  func() error
}

// Makes an executor for a URL.
type executorFor func(address string) (remotecommand.Executor, error)

func config() *rest.Config {
	c := &rest.Config{}
	if given.CA != "" {
		c.TLSClientConfig.CAData = []byte(given.CA)
	}
	return c
}

func overSPDY(protocols ...string) executorFor {
	return func(address string) (remotecommand.Executor, error) {
		parsed, err := url.Parse(address)
		if err != nil {
			return nil, err
		}
		if len(protocols) == 0 {
			return remotecommand.NewSPDYExecutor(config(), "POST", parsed)
		}
		transport, upgrader, err := spdy.RoundTripperFor(config())
		if err != nil {
			return nil, err
		}
		return remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, "POST", parsed, protocols...)
	}
}

func overWebSocket(protocols ...string) executorFor {
	return func(address string) (remotecommand.Executor, error) {
		if len(protocols) == 0 {
			return remotecommand.NewWebSocketExecutor(config(), "GET", address)
		}
		return remotecommand.NewWebSocketExecutorForProtocols(config(), "GET", address, protocols...)
	}
}

// Fails over WebSocket, and then takes the same URL over SPDY, as kubectl and crictl do.
func fallingBack(address string) (remotecommand.Executor, error) {
	first, err := overWebSocket("v9.unknown.k8s.io")(address)
	if err != nil {
		return nil, err
	}
	second, err := overSPDY()(address)
	if err != nil {
		return nil, err
	}
	return remotecommand.NewFallbackExecutor(first, second, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || streaming.IsUpgradeFailure(err)
	})
}

// Puts kubelet's proxy between client and server, and says where it listens.
func proxied(address string) (string, error) {
	location, err := url.Parse(address)
	if err != nil {
		return "", err
	}
	handler := proxy.NewUpgradeAwareHandler(location, nil, false, true, proxyErrors{})
	// Not closed: the sessions that it carries end with the program.
	return httptest.NewServer(handler).URL, nil
}

type proxyErrors struct{}

func (proxyErrors) Error(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusInternalServerError)
}

func throughProxy(with executorFor) executorFor {
	return func(address string) (remotecommand.Executor, error) {
		address, err := proxied(address)
		if err != nil {
			return nil, err
		}
		return with(address)
	}
}

func dialThroughProxy(dial dialer) dialer {
	return func(address *url.URL) (httpstream.Dialer, error) {
		between, err := proxied(address.String())
		if err != nil {
			return nil, err
		}
		parsed, err := url.Parse(between)
		if err != nil {
			return nil, err
		}
		return dial(parsed)
	}
}

func cases() []testCase {
	transports := []struct {
		name string
		with executorFor
		json bool
	}{
		{"spdy", overSPDY(), true},
		{"spdy-v4", overSPDY("v4.channel.k8s.io"), true},
		{"spdy-v3", overSPDY("v3.channel.k8s.io"), false},
		{"spdy-v2", overSPDY("v2.channel.k8s.io"), false},
		{"websocket", overWebSocket(), true},
		{"websocket-v4", overWebSocket("v4.channel.k8s.io"), true},
		{"websocket-tls", overWebSocket(), true},
		{"spdy-tls", overSPDY(), true},
		{"fallback", fallingBack, true},
		{"spdy-proxied", throughProxy(overSPDY()), true},
		{"websocket-proxied", throughProxy(overWebSocket()), true},
	}
	var all []testCase
	add := func(name string, run func(address string) error) {
		address := given.URLs[name]
		all = append(all, testCase{name, func() error {
			if address == "" {
				return errors.New("there is no URL for it")
			}
			return run(address)
		}})
	}
	for _, transport := range transports {
		add("both "+transport.name, func(address string) error { return both(transport.with, address, transport.json) })
		add("big "+transport.name, func(address string) error { return big(transport.with, address) })
		add("fail "+transport.name, func(address string) error { return fail(transport.with, address) })
		if transport.name != "websocket-v4" {
			// Before v5, WebSocket had no way to say that the input ends.
			add("cat "+transport.name, func(address string) error { return cat(transport.with, address) })
		}
		if transport.name != "spdy-v2" {
			add("sizes "+transport.name, func(address string) error { return sizes(transport.with, address) })
		}
		add("attach "+transport.name, func(address string) error { return attach(transport.with, address) })
	}
	add("both spdy-v1", func(address string) error {
		// Its client may miss the status, which is why there is a second version.
		return outputs(overSPDY("channel.k8s.io"), address, func(error) error { return nil })
	})
	for name, dial := range map[string]dialer{
		"spdy": dialSPDY, "tunnel": dialTunnel,
		"spdy-tls": dialSPDY, "tunnel-tls": dialTunnel,
		"spdy-proxied": dialThroughProxy(dialSPDY), "tunnel-proxied": dialThroughProxy(dialTunnel),
	} {
		add("forward "+name, func(address string) error { return forward(dial, address) })
		add("forward-closed "+name, func(address string) error { return forwardToNobody(dial, address) })
	}
	return all
}

func stream(with executorFor, address string, options remotecommand.StreamOptions) error {
	executor, err := with(address)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return executor.StreamWithContext(ctx, options)
}

func outputs(with executorFor, address string, judge func(error) error) error {
	var stdout, stderr bytes.Buffer
	err := stream(with, address, remotecommand.StreamOptions{
		Stdin: strings.NewReader(""), Stdout: &stdout, Stderr: &stderr,
	})
	if err := judge(err); err != nil {
		return err
	}
	if stdout.String() != strings.Repeat("out ", 100) || stderr.String() != strings.Repeat("err ", 100) {
		return fmt.Errorf("stdout %q, stderr %q", stdout.String(), stderr.String())
	}
	return nil
}

func both(with executorFor, address string, json bool) error {
	return outputs(with, address, func(err error) error {
		var exit exec.CodeExitError
		if json && (!errors.As(err, &exit) || exit.Code != 3) {
			return fmt.Errorf("expected exit code 3: %v", err)
		}
		if err == nil || !strings.Contains(err.Error(), "command terminated with exit code 3") {
			return fmt.Errorf("expected the exit code in the text: %v", err)
		}
		return nil
	})
}

func pattern(length int) []byte {
	bytes := make([]byte, length)
	for at := range bytes {
		bytes[at] = byte((uint64(at) * 2654435761) >> 24)
	}
	return bytes
}

// Takes its time with what it is given. (The buffer is not embedded: io.Copy would fill it without Write.)
type slowWriter struct {
	buffer bytes.Buffer
}

func (w *slowWriter) Write(p []byte) (int, error) {
	time.Sleep(100 * time.Microsecond)
	return w.buffer.Write(p)
}

func big(with executorFor, address string) error {
	var stdout slowWriter
	err := stream(with, address, remotecommand.StreamOptions{
		Stdin: strings.NewReader(""), Stdout: &stdout, Stderr: io.Discard,
	})
	if err == nil && !bytes.Equal(stdout.buffer.Bytes(), pattern(given.OutputLength)) {
		err = fmt.Errorf("%d bytes came, or the wrong ones", stdout.buffer.Len())
	}
	return err
}

func fail(with executorFor, address string) error {
	err := stream(with, address, remotecommand.StreamOptions{
		Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard,
	})
	if err == nil || !strings.Contains(err.Error(), "error executing command in container: no such file") {
		return fmt.Errorf("expected a failure: %v", err)
	}
	return nil
}

func cat(with executorFor, address string) error {
	sent := pattern(3 << 20)
	var stdout bytes.Buffer
	err := stream(with, address, remotecommand.StreamOptions{
		Stdin: bytes.NewReader(sent), Stdout: &stdout, Stderr: io.Discard,
	})
	if err == nil && !bytes.Equal(stdout.Bytes(), sent) {
		err = fmt.Errorf("%d bytes came back, or the wrong ones", stdout.Len())
	}
	return err
}

func attach(with executorFor, address string) error {
	var stdout bytes.Buffer
	err := stream(with, address, remotecommand.StreamOptions{Stdout: &stdout, Stderr: io.Discard})
	if err == nil && stdout.String() != "attached" {
		err = fmt.Errorf("stdout %q", stdout.String())
	}
	return err
}

// A terminal that has three sizes, one after the other has been seen.
type terminal struct {
	buffer bytes.Buffer
	seen   chan struct{}
	next   uint16
}

func (t *terminal) Next() *remotecommand.TerminalSize {
	if t.next > 0 {
		<-t.seen
	}
	if t.next == 3 {
		return nil
	}
	t.next++
	return &remotecommand.TerminalSize{Width: 80 + t.next, Height: 24 + t.next}
}

func (t *terminal) Write(p []byte) (int, error) {
	n, err := t.buffer.Write(p)
	for range bytes.Count(p, []byte{' '}) {
		t.seen <- struct{}{}
	}
	return n, err
}

func sizes(with executorFor, address string) error {
	t := &terminal{seen: make(chan struct{}, 10)}
	input, _ := io.Pipe()
	err := stream(with, address, remotecommand.StreamOptions{
		Stdin: input, Stdout: t, Tty: true, TerminalSizeQueue: t,
	})
	if err == nil && t.buffer.String() != "81x25 82x26 83x27 " {
		err = fmt.Errorf("stdout %q", t.buffer.String())
	}
	return err
}

type dialer func(address *url.URL) (httpstream.Dialer, error)

func dialSPDY(address *url.URL) (httpstream.Dialer, error) {
	transport, upgrader, err := spdy.RoundTripperFor(config())
	if err != nil {
		return nil, err
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", address), nil
}

func dialTunnel(address *url.URL) (httpstream.Dialer, error) {
	return portforward.NewSPDYOverWebsocketDialer(address, config())
}

// Forwards two local ports, and gives their numbers to use().
func forwarding(dial dialer, address string, ports []int, use func(local []uint16) error) error {
	parsed, err := url.Parse(address)
	if err != nil {
		return err
	}
	dialer, err := dial(parsed)
	if err != nil {
		return err
	}
	var wanted []string
	for _, port := range ports {
		wanted = append(wanted, fmt.Sprintf("0:%d", port))
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, wanted, stop, ready, io.Discard, os.Stderr)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-ended:
		return fmt.Errorf("it never got ready: %w", err)
	}
	forwarded, err := forwarder.GetPorts()
	if err != nil {
		return err
	}
	var local []uint16
	for _, port := range forwarded {
		local = append(local, port.Local)
	}
	err = use(local)
	close(stop)
	return errors.Join(err, <-ended)
}

// Sends, half-closes, and reads the answer to its end.
func talk(port uint16, sent []byte) ([]byte, error) {
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, err
	}
	writing := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		writing <- errors.Join(err, conn.(*net.TCPConn).CloseWrite())
	}()
	received, err := io.ReadAll(conn)
	return received, errors.Join(err, <-writing)
}

func forward(dial dialer, address string) error {
	return forwarding(dial, address, []int{given.EchoPort, given.CountPort}, func(local []uint16) error {
		results := make(chan error)
		const connections = 10
		for range connections {
			go func() {
				sent := pattern(500_000)
				received, err := talk(local[0], sent)
				if err == nil && !bytes.Equal(received, sent) {
					err = fmt.Errorf("%d bytes came back, or the wrong ones", len(received))
				}
				results <- err
			}()
		}
		var err error
		for range connections {
			err = errors.Join(err, <-results)
		}
		answer, counted := talk(local[1], make([]byte, 70_001))
		if counted == nil && string(answer) != "70001 bytes" {
			counted = fmt.Errorf("the answer was %q", answer)
		}
		return errors.Join(err, counted)
	})
}

func forwardToNobody(dial dialer, address string) error {
	err := forwarding(dial, address, []int{given.ClosedPort}, func(local []uint16) error {
		answer, err := talk(local[0], []byte("hello?"))
		if len(answer) > 0 {
			return fmt.Errorf("somebody answered %q", answer)
		}
		// A reset is as good an answer as an end.
		_ = err
		return nil
	})
	// Clients of this version end the session when a connection fails; that is theirs to decide.
	if errors.Is(err, portforward.ErrLostConnectionToPod) {
		err = nil
	}
	return err
}
