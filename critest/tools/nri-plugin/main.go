// Command nri-plugin is a plugin for tests, on NRI's own client library: it writes down every call, one JSON object per line, and
// does at some of them what its configuration says. The configuration is the -config file, or for a plugin that was started by the
// runtime what the runtime hands over.
//
//	{"log": "/path", "rules": [
//	  {"event": "CreateContainer", "of": "name of a pod or container, or *", "do": "fail|hang|die|adjust|update",
//	   "adjust": {ContainerAdjustment}, "update": [{"container": "its name", "resources": {LinuxResources}, "mayFail": true}]}]}
//
// On standard input it takes updates to ask for unsolicited, one list as above per line.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

type change struct {
	Container string          `json:"container"`
	Resources json.RawMessage `json:"resources"`
	MayFail   bool            `json:"mayFail"`
}

type rule struct {
	Event  string          `json:"event"`
	Of     string          `json:"of"`
	Do     string          `json:"do"`
	Adjust json.RawMessage `json:"adjust"`
	Update []change        `json:"update"`
}

type configuration struct {
	Log   string `json:"log"`
	Rules []rule `json:"rules"`
}

type plugin struct {
	stub stub.Stub

	lock   sync.Mutex
	config configuration
	out    *os.File
	ids    map[string]string
}

func (p *plugin) configure(text []byte) error {
	if err := json.Unmarshal(text, &p.config); err != nil {
		return err
	}
	out, err := os.OpenFile(p.config.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	p.out = out
	return err
}

func message(m proto.Message) json.RawMessage {
	text, err := protojson.Marshal(m)
	if err != nil {
		text, _ = json.Marshal(err.Error())
	}
	return text
}

// write adds a line to the log.
func (p *plugin) write(event string, pod *api.PodSandbox, container *api.Container, more map[string]any) {
	line := map[string]any{"event": event}
	if pod != nil {
		line["pod"] = pod.GetName()
		line["podDetails"] = message(pod)
	}
	if container != nil {
		line["container"] = container.GetName()
		line["containerDetails"] = message(container)
	}
	for key, value := range more {
		line[key] = value
	}
	text, _ := json.Marshal(line)
	p.lock.Lock()
	defer p.lock.Unlock()
	if container != nil {
		p.ids[container.GetName()] = container.GetId()
	}
	if p.out != nil {
		_, _ = p.out.Write(append(text, '\n'))
	}
}

func (p *plugin) updates(changes []change) ([]*api.ContainerUpdate, error) {
	var updates []*api.ContainerUpdate
	for _, c := range changes {
		p.lock.Lock()
		id, known := p.ids[c.Container]
		p.lock.Unlock()
		if !known {
			id = c.Container
		}
		resources := &api.LinuxResources{}
		if err := protojson.Unmarshal(c.Resources, resources); err != nil {
			return nil, err
		}
		updates = append(updates, &api.ContainerUpdate{
			ContainerId:   id,
			Linux:         &api.LinuxContainerUpdate{Resources: resources},
			IgnoreFailure: c.MayFail,
		})
	}
	return updates, nil
}

// act writes the call down and does what the rules say.
func (p *plugin) act(ctx context.Context, event string, pod *api.PodSandbox, container *api.Container, more map[string]any) (
	*api.ContainerAdjustment, []*api.ContainerUpdate, error,
) {
	p.write(event, pod, container, more)
	name := pod.GetName()
	if container != nil {
		name = container.GetName()
	}
	var (
		adjust  *api.ContainerAdjustment
		updates []*api.ContainerUpdate
	)
	for _, r := range p.config.Rules {
		if r.Event != event || (r.Of != "*" && r.Of != name) {
			continue
		}
		switch r.Do {
		case "fail":
			return nil, nil, fmt.Errorf("no %s of %s", event, name)
		case "hang":
			<-ctx.Done()
			select {}
		case "die":
			os.Exit(1)
		case "adjust":
			adjust = &api.ContainerAdjustment{}
			if err := protojson.Unmarshal(r.Adjust, adjust); err != nil {
				return nil, nil, err
			}
		case "update":
			var err error
			if updates, err = p.updates(r.Update); err != nil {
				return nil, nil, err
			}
		}
	}
	return adjust, updates, nil
}

func (p *plugin) event(ctx context.Context, event string, pod *api.PodSandbox, container *api.Container) error {
	_, _, err := p.act(ctx, event, pod, container, nil)
	return err
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (stub.EventMask, error) {
	if config != "" {
		if err := p.configure([]byte(config)); err != nil {
			return 0, err
		}
	}
	if p.out == nil {
		return 0, errors.New("there is no configuration")
	}
	p.write("Configure", nil, nil, map[string]any{"runtime": runtime, "version": version})
	return 0, nil
}

func (p *plugin) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	p.write("Synchronize", nil, nil, map[string]any{"pods": len(pods), "containers": len(containers)})
	for _, pod := range pods {
		p.write("HasPod", pod, nil, nil)
	}
	for _, container := range containers {
		p.write("HasContainer", nil, container, nil)
	}
	_, updates, err := p.act(ctx, "Synchronized", nil, nil, nil)
	return updates, err
}

func (p *plugin) Shutdown(context.Context) { p.write("Shutdown", nil, nil, nil) }

func (p *plugin) RunPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.event(ctx, "RunPodSandbox", pod, nil)
}

func (p *plugin) UpdatePodSandbox(ctx context.Context, pod *api.PodSandbox, overhead, resources *api.LinuxResources) error {
	_, _, err := p.act(ctx, "UpdatePodSandbox", pod, nil,
		map[string]any{"overhead": message(overhead), "resources": message(resources)})
	return err
}

func (p *plugin) PostUpdatePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.event(ctx, "PostUpdatePodSandbox", pod, nil)
}

func (p *plugin) StopPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.event(ctx, "StopPodSandbox", pod, nil)
}

func (p *plugin) RemovePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return p.event(ctx, "RemovePodSandbox", pod, nil)
}

func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) (
	*api.ContainerAdjustment, []*api.ContainerUpdate, error,
) {
	return p.act(ctx, "CreateContainer", pod, container, nil)
}

func (p *plugin) PostCreateContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.event(ctx, "PostCreateContainer", pod, container)
}

func (p *plugin) StartContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.event(ctx, "StartContainer", pod, container)
}

func (p *plugin) PostStartContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.event(ctx, "PostStartContainer", pod, container)
}

func (p *plugin) UpdateContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container, resources *api.LinuxResources) (
	[]*api.ContainerUpdate, error,
) {
	_, updates, err := p.act(ctx, "UpdateContainer", pod, container, map[string]any{"resources": message(resources)})
	return updates, err
}

func (p *plugin) PostUpdateContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.event(ctx, "PostUpdateContainer", pod, container)
}

func (p *plugin) StopContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) ([]*api.ContainerUpdate, error) {
	_, updates, err := p.act(ctx, "StopContainer", pod, container, nil)
	return updates, err
}

func (p *plugin) RemoveContainer(ctx context.Context, pod *api.PodSandbox, container *api.Container) error {
	return p.event(ctx, "RemoveContainer", pod, container)
}

// validator also looks at what the others have asked for.
type validator struct{ *plugin }

func (v validator) ValidateContainerAdjustment(ctx context.Context, request *api.ValidateContainerAdjustmentRequest) error {
	_, _, err := v.act(ctx, "ValidateContainerAdjustment", request.GetPod(), request.GetContainer(),
		map[string]any{"adjust": message(request.GetAdjust()), "owners": message(request.GetOwners())})
	return err
}

func run() error {
	socket := flag.String("socket", "", "where the runtime listens")
	index := flag.String("index", "", "two digits")
	name := flag.String("name", "", "the plugin's name")
	config := flag.String("config", "", "a configuration file")
	validates := flag.Bool("validate", false, "look at what others have asked for")
	again := flag.Bool("again", false, "connect again whenever the connection ends")
	flag.Parse()

	p := &plugin{ids: map[string]string{}}
	var options []stub.Option
	if *config != "" {
		text, err := os.ReadFile(*config)
		if err != nil {
			return err
		}
		if err := p.configure(text); err != nil {
			return err
		}
		options = append(options, stub.WithSocketPath(*socket), stub.WithPluginIdx(*index), stub.WithPluginName(*name))
	}
	var handlers any = p
	if *validates {
		handlers = validator{p}
	}
	for first := true; ; first = false {
		s, err := stub.New(handlers, options...)
		if err != nil {
			return err
		}
		p.lock.Lock()
		p.stub = s
		p.lock.Unlock()
		if first {
			go p.takeUpdates()
		}
		err = s.Run(context.Background())
		if !*again {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// takeUpdates asks for what stands on standard input.
func (p *plugin) takeUpdates() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var changes []change
		if err := json.Unmarshal(lines.Bytes(), &changes); err != nil {
			p.write("Updated", nil, nil, map[string]any{"error": err.Error()})
			continue
		}
		updates, err := p.updates(changes)
		var failed []*api.ContainerUpdate
		if err == nil {
			p.lock.Lock()
			s := p.stub
			p.lock.Unlock()
			failed, err = s.UpdateContainers(updates)
		}
		more := map[string]any{"failed": len(failed)}
		if err != nil {
			more["error"] = err.Error()
		}
		p.write("Updated", nil, nil, more)
	}
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "nri-plugin:", err)
		os.Exit(1)
	}
}
