{{/* Bytes of a quantity in Mi or Gi, the two units that the schema allows. */}}
{{- define "sluice.bytes" -}}
{{- if hasSuffix "Gi" . -}}
{{- mul (trimSuffix "Gi" . | int64) 1073741824 -}}
{{- else -}}
{{- mul (trimSuffix "Mi" . | int64) 1048576 -}}
{{- end -}}
{{- end -}}

{{/* Ranks of one replica group. */}}
{{- define "sluice.worldSize" -}}
{{- mul (int64 .Values.parallel.tp) (int64 .Values.parallel.pp) -}}
{{- end -}}

{{/* Ranks that one worker pod holds: its GPUs, or one whole group on CPUs. */}}
{{- define "sluice.ranksPerPod" -}}
{{- if eq .Values.model.device "cuda" -}}
{{- int64 .Values.worker.gpusPerPod -}}
{{- else -}}
{{- include "sluice.worldSize" . -}}
{{- end -}}
{{- end -}}

{{/* Worker pods for a number of groups: arguments (root, groups). */}}
{{- define "sluice.workerPods" -}}
{{- $root := index . 0 -}}
{{- $ranks := mul (int64 (index . 1)) (include "sluice.worldSize" $root | int64) -}}
{{- $perPod := include "sluice.ranksPerPod" $root | int64 -}}
{{- div (sub (add $ranks $perPod) 1) $perPod -}}
{{- end -}}

{{/* Seconds that a pod lives on after its deletion: the streams' time, and 15 s in which Serve hears
of it and starts a replacement. */}}
{{- define "sluice.preStopSeconds" -}}
{{- add (int64 .Values.drain.timeoutSeconds) 15 -}}
{{- end -}}

{{/* ... and 30 s more, in which Ray stops its processes, before the kubelet kills them. */}}
{{- define "sluice.terminationSeconds" -}}
{{- add (include "sluice.preStopSeconds" . | int64) 30 -}}
{{- end -}}
