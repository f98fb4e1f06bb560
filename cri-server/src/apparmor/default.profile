# What containers may do that ask for no other profile, beside what their namespaces, capabilities and seccomp profile allow. It names no
# file of the image; it closes what of the kernel is one for all containers, whether or not the paths are masked by mounts too.

profile podvisor-default flags=(attach_disconnected,mediate_deleted) {
  file,
  network,
  capability,
  unix,
  dbus,

  # Stopped by what is outside, and free among themselves.
  signal (receive) peer=unconfined,
  signal (receive) peer={runc,crun,/usr/sbin/runc,/usr/bin/crun},
  signal (send, receive) peer=podvisor-default,
  ptrace (trace, read, tracedby, readby) peer=podvisor-default,

  # A new mount would show again what is masked.
  deny mount,
  deny remount,
  deny umount,
  deny pivot_root,

  # The machine's memory, keys and switches.
  deny /proc/{kcore,kmem,mem,kallsyms,keys,latency_stats,timer_list,timer_stats,sched_debug,sysrq-trigger} rwklx,
  deny /proc/{acpi,asound,bus,driver,fs,irq,mtrr,scsi}{,/**} wklx,
  # Directly in /proc only processes are a container's own.
  deny /proc/* w,

  # Sysctls: those of the pod's own namespaces are left (net, fs.mqueue, host name, System V IPC).
  deny /proc/sys/{abi,crypto,debug,dev,sunrpc,user,vm,xen}{,/**} wklx,
  deny /proc/sys/fs/{[^m],m[^q]}*{,/**} wklx,
  deny /proc/sys/kernel/{[^dhms],d[^o],h[^o],m[^s],s[^eh],sh[^m],se[^m]}*{,/**} wklx,

  # Devices and settings of the machine. What is below /sys/fs/cgroup is for cgroup namespaces to tell.
  deny /sys/{block,bus,class,dev,devices,hypervisor,kernel,module,power}{,/**} wklx,
  deny /sys/fs/{[^c],c[^g]}*{,/**} wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/{debug,security,tracing}/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
}
