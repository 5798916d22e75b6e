{{- define "cohort.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* At most 40 characters: names of pods and hashes come after it. */ -}}
{{- define "cohort.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "cohort.router" -}}
{{ include "cohort.fullname" . }}-router
{{- end -}}

{{- define "cohort.groups" -}}
{{ include "cohort.fullname" . }}-group
{{- end -}}

{{- define "cohort.selector" -}}
app.kubernetes.io/name: {{ include "cohort.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "cohort.labels" -}}
{{ include "cohort.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "cohort.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "cohort.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "cohort.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- /* Ranks of a group. */ -}}
{{- define "cohort.ranks" -}}
{{- mul (dig "group" "tensor_parallel" 1 .Values.config | int) (dig "group" "data_parallel" 1 .Values.config | int) -}}
{{- end -}}

{{- /* Metrics ports of the ranks that follow: a list of the root context and of how many ranks there are. */ -}}
{{- define "cohort.followerPorts" -}}
{{- $root := index . 0 -}}{{- $ranks := index . 1 | int -}}
{{- if and $root.Values.metrics.enabled $root.Values.metrics.ranks }}
{{- range $rank := untilStep 1 $ranks 1 }}
- name: metrics-{{ $rank }}
  containerPort: {{ add $root.Values.metrics.port $rank }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* A time of the configuration in whole seconds, rounded up; the binary's own default where it is not given. */ -}}
{{- define "cohort.seconds" -}}
{{- $part := index . 0 -}}{{- $key := index . 1 -}}{{- $default := index . 2 -}}{{- $config := index . 3 -}}
{{- dig $part $key $default $config | float64 | ceil | int -}}
{{- end -}}

{{- /* The longest a router may take to stop: preStop, withdraw, drain, and slack. */ -}}
{{- define "cohort.routerGrace" -}}
{{- $withdraw := include "cohort.seconds" (list "router" "withdraw_grace_s" 0 .Values.config) | int -}}
{{- $drain := include "cohort.seconds" (list "router" "drain_grace_s" 10 .Values.config) | int -}}
{{- add .Values.router.preStopSeconds $withdraw $drain 10 -}}
{{- end -}}

{{- /* The longest a group may take to stop: its followers end after its leader. */ -}}
{{- define "cohort.groupGrace" -}}
{{- $drain := include "cohort.seconds" (list "group" "drain_grace_s" 10 .Values.config) | int -}}
{{- add .Values.groups.preStopSeconds $drain 15 -}}
{{- end -}}

{{- /* The Secrets of certificates: of the routers' listeners, of the groups', of routers at groups; empty for none. */ -}}
{{- define "cohort.routerTls" -}}
{{- $tls := .Values.security.tls -}}
{{- $tls.router.secretName | default (ternary (printf "%s-tls" (include "cohort.router" .)) "" $tls.certManager.enabled) -}}
{{- end -}}

{{- define "cohort.groupTls" -}}
{{- $tls := .Values.security.tls -}}
{{- $tls.groups.secretName | default (ternary (printf "%s-tls" (include "cohort.groups" .)) "" $tls.certManager.enabled) -}}
{{- end -}}

{{- define "cohort.routerAtGroupsTls" -}}
{{- $tls := .Values.security.tls -}}
{{- if $tls.groups.routerSecretName -}}
{{- $tls.groups.routerSecretName -}}
{{- else if $tls.certManager.enabled -}}
{{- include "cohort.router" . }}-at-groups-tls
{{- else if $tls.groups.secretName -}}
{{- fail "security.tls.groups.routerSecretName is needed beside security.tls.groups.secretName: groups let in routers with a certificate only" -}}
{{- end -}}
{{- end -}}

{{- /* What the configuration says of Secrets, under the paths where they are mounted. */ -}}
{{- define "cohort.securityConfig" -}}
{{- $tls := .Values.security.tls -}}
{{- if or (include "cohort.routerTls" .) .Values.security.keys.secretName .Values.security.jwt.secretName }}
router:
  {{- if include "cohort.routerTls" . }}
  tls:
    certificate: /etc/cohort-router-tls/tls.crt
    key: /etc/cohort-router-tls/tls.key
    {{- if $tls.router.requireClients }}
    client_ca: /etc/cohort-router-tls/ca.crt
    {{- end }}
  {{- end }}
  {{- if .Values.security.keys.secretName }}
  keys_file: /etc/cohort-keys/{{ .Values.security.keys.key }}
  {{- end }}
  {{- if .Values.security.jwt.secretName }}
  jwt:
    jwks_file: /etc/cohort-jwt/{{ .Values.security.jwt.key }}
  {{- end }}
{{- end }}
{{- if .Values.security.tls.collector.secretName }}
telemetry:
  otlp_ca: /etc/cohort-otlp-ca/ca.crt
{{- end }}
{{- if include "cohort.groupTls" . }}
group:
  tls:
    certificate: /etc/cohort-group-tls/tls.crt
    key: /etc/cohort-group-tls/tls.key
    client_ca: /etc/cohort-group-tls/ca.crt
{{- end }}
{{- if or (include "cohort.groupTls" .) .Values.security.clusterSecret.secretName }}
cluster:
  {{- if .Values.security.clusterSecret.secretName }}
  secret_file: /etc/cohort-secret/{{ .Values.security.clusterSecret.key }}
  {{- end }}
  {{- if include "cohort.groupTls" . }}
  tls:
    ca: /etc/cohort-at-groups-tls/ca.crt
    certificate: /etc/cohort-at-groups-tls/tls.crt
    key: /etc/cohort-at-groups-tls/tls.key
  {{- end }}
{{- end }}
{{- end -}}

{{- /* The Secrets of a part, `router` or `group`, as lines of directory and name, and the one file of it where the others are
none of that part's business. */ -}}
{{- define "cohort.secrets" -}}
{{- $root := index . 0 -}}
{{- $secrets := list -}}
{{- if eq (index . 1) "router" -}}
{{- $secrets = list (list "router-tls" (include "cohort.routerTls" $root)) (list "at-groups-tls" (include "cohort.routerAtGroupsTls" $root)) (list "keys" $root.Values.security.keys.secretName) (list "jwt" $root.Values.security.jwt.secretName) -}}
{{- else -}}
{{- $secrets = list (list "group-tls" (include "cohort.groupTls" $root)) -}}
{{- end -}}
{{- $secrets = append $secrets (list "secret" $root.Values.security.clusterSecret.secretName) -}}
{{- $secrets = append $secrets (list "otlp-ca" $root.Values.security.tls.collector.secretName "ca.crt") -}}
{{- if and (eq (index . 1) "group") (eq (include "cohort.discovery" $root) "registration") -}}
{{- $secrets = append $secrets (list "router-ca" (include "cohort.routerTls" $root) "ca.crt") -}}
{{- end -}}
{{- range $secrets }}
{{- if index . 1 }}
- name: {{ index . 0 }}
  secret: {{ index . 1 }}
  {{- if gt (len .) 2 }}
  only: {{ index . 2 }}
  {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "cohort.secretMounts" -}}
{{- range include "cohort.secrets" . | fromYamlArray }}
- name: {{ .name }}
  mountPath: /etc/cohort-{{ .name }}
  readOnly: true
{{- end }}
{{- end -}}

{{- define "cohort.secretVolumes" -}}
{{- range include "cohort.secrets" . | fromYamlArray }}
- name: {{ .name }}
  secret:
    secretName: {{ .secret }}
    defaultMode: 0440
    {{- with .only }}
    items:
      - key: {{ . }}
        path: {{ . }}
    {{- end }}
{{- end }}
{{- end -}}

{{- /* Where the leaders of all groups listen: every address of their service, or the names of their pods. */ -}}
{{- define "cohort.workers" -}}
{{- $service := include "cohort.groups" . -}}
{{- $scheme := ternary "https" "http" (ne (include "cohort.groupTls" .) "") -}}
{{- if eq (include "cohort.discovery" .) "registration" }}
[]
{{- else if eq (include "cohort.discovery" .) "dns" }}
- dns+{{ $scheme }}://{{ $service }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:{{ .Values.groups.port }}
{{- else }}
{{- $scaled := .Values.groups.autoscaling -}}
{{- $groups := ternary $scaled.maxReplicas .Values.groups.replicas $scaled.enabled | int -}}
{{- range $index := until $groups }}
- {{ $scheme }}://{{ $service }}-{{ $index }}.{{ $service }}.{{ $.Release.Namespace }}.svc.{{ $.Values.clusterDomain }}:{{ $.Values.groups.port }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* The weights of those, which are known by the names of their pods only. */ -}}
{{- define "cohort.weights" -}}
{{- if ne (include "cohort.discovery" .) "names" -}}
{{- fail "groups.weights are those of pods by name: set groups.discovery to names" -}}
{{- end -}}
{{- $workers := include "cohort.workers" . | fromYamlArray -}}
{{- if gt (len .Values.groups.weights) (len $workers) -}}
{{- fail (printf "groups.weights has %d weights for %d group(s)" (len .Values.groups.weights) (len $workers)) -}}
{{- end -}}
{{- range $index, $weight := .Values.groups.weights }}
- {{ index $workers $index }}={{ int $weight }}
{{- end }}
{{- end -}}

{{- /* How routers find groups. The service of a LeaderWorkerSet has the pods of all ranks, so its leaders go by name. */ -}}
{{- define "cohort.discovery" -}}
{{- if and (eq .Values.groups.discovery "dns") (eq .Values.groups.kind "leaderworkerset") -}}
{{- fail "groups.discovery is dns, and the service of a LeaderWorkerSet has the pods of all ranks; set it to names" -}}
{{- end -}}
{{- default (ternary "dns" "names" (eq .Values.groups.kind "statefulset")) .Values.groups.discovery -}}
{{- end -}}

{{- /* Where groups register: a service of all routers, also of those that wait for a group. */ -}}
{{- define "cohort.registry" -}}
{{ include "cohort.router" . }}-registry.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end -}}

{{- /* Where a pod tells routers that its leader is, by the name that a certificate of the groups has. */ -}}
{{- define "cohort.advertised" -}}
{{- $scheme := ternary "https" "http" (ne (include "cohort.groupTls" .) "") -}}
{{ $scheme }}://$(POD_NAME).{{ include "cohort.groups" . }}.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:{{ .Values.groups.port }}
{{- end -}}

{{- /* What the configuration says of registration. */ -}}
{{- define "cohort.registrationConfig" -}}
{{- if not .Values.security.clusterSecret.secretName -}}
{{- fail "groups.discovery is registration, which needs security.clusterSecret.secretName: groups show the secret when they register" -}}
{{- end }}
router:
  registration: true
group:
  routers:
    - dns+{{ ternary "https" "http" (ne (include "cohort.routerTls" .) "") }}://{{ include "cohort.registry" . }}:50051
  {{- if include "cohort.routerTls" . }}
  routers_ca: /etc/cohort-router-ca/ca.crt
  {{- end }}
{{- end -}}

{{- /* The cluster file: the given tree, and what the chart knows better. */ -}}
{{- define "cohort.config" -}}
{{- include "cohort.configWith" (list . .Values.groups.weights) -}}
{{- end -}}

{{- /* Likewise: a list of the root context and the groups' weights. */ -}}
{{- define "cohort.configWith" -}}
{{- $weights := index . 1 -}}
{{- with index . 0 -}}
{{- $config := deepCopy .Values.config -}}
{{- $router := dict "grpc_listen" "0.0.0.0:50051" "http_listen" "0.0.0.0:8080" -}}
{{- $_ := set $router "workers" (include "cohort.workers" . | fromYamlArray) -}}
{{- if $weights -}}
{{- $_ := set $router "weights" (include "cohort.weights" . | fromYamlArray) -}}
{{- end -}}
{{- $config = mergeOverwrite $config (dict "router" $router) -}}
{{- if .Values.metrics.enabled -}}
{{- $listen := printf "0.0.0.0:%d" (int .Values.metrics.port) -}}
{{- $config = mergeOverwrite $config (dict "group" (dict "metrics_listen" $listen)) -}}
{{- if .Values.metrics.ranks -}}
{{- $listen := printf "0.0.0.0:%d" (add .Values.metrics.port 1) -}}
{{- $config = mergeOverwrite $config (dict "group" (dict "rank_metrics_listen" $listen)) -}}
{{- end -}}
{{- end -}}
{{- if eq (include "cohort.discovery" .) "registration" -}}
{{- $config = mergeOverwrite $config (include "cohort.registrationConfig" . | fromYaml) -}}
{{- end -}}
{{- if ne .Values.model.source "embedded" -}}
{{- $path := .Values.model.mountPath -}}
{{- if .Values.model.directory -}}{{- $path = printf "%s/%s" $path .Values.model.directory -}}{{- end -}}
{{- $config = mergeOverwrite $config (dict "model" (dict "path" $path)) -}}
{{- end -}}
{{- $config = mergeOverwrite $config (include "cohort.securityConfig" . | fromYaml) -}}
{{- if and .Values.security.tls.collector.secretName (not (hasPrefix "https://" (dig "telemetry" "otlp_endpoint" "" .Values.config))) -}}
{{- fail "security.tls.collector.secretName is of no use without an https:// config.telemetry.otlp_endpoint" -}}
{{- end -}}
{{- $jwt := ($config.router.jwt | default dict) -}}
{{- if and .Values.security.jwt.secretName (not (and $jwt.issuers $jwt.audiences)) -}}
{{- fail "security.jwt.secretName needs config.router.jwt.issuers and config.router.jwt.audiences: tokens of anybody for anybody prove nothing" -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}
{{- end -}}

{{- /* Without the weights: routers go on with those as they change, so they roll nothing. */ -}}
{{- define "cohort.checksum" -}}
{{- include "cohort.configWith" (list . list) | sha256sum -}}
{{- end -}}

{{- /* What a change of which must roll the pods, in every pod template. */ -}}
{{- define "cohort.podAnnotations" -}}
checksum/config: {{ include "cohort.checksum" .root }}
{{- with .annotations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The volume of the model and its mount. */ -}}
{{- define "cohort.modelVolume" -}}
{{- if eq .Values.model.source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ required "model.pvc.claimName is needed when model.source is pvc" .Values.model.pvc.claimName }}
    readOnly: true
{{- else if eq .Values.model.source "hostPath" }}
- name: model
  hostPath:
    path: {{ required "model.hostPath.path is needed when model.source is hostPath" .Values.model.hostPath.path }}
    type: Directory
{{- else if eq .Values.model.source "init" }}
- name: model
  emptyDir:
    {{- if .Values.model.init.sizeLimit }}
    sizeLimit: {{ .Values.model.init.sizeLimit }}
    {{- else }} {}
    {{- end }}
{{- end }}
{{- end -}}

{{- define "cohort.modelMount" -}}
{{- if ne .Values.model.source "embedded" }}
- name: model
  mountPath: {{ .Values.model.mountPath }}
  readOnly: true
{{- end }}
{{- end -}}

{{- /* The init container that fetches the model: a list of the root context and what the pod needs of it. */ -}}
{{- define "cohort.modelInit" -}}
{{- $root := index . 0 -}}
{{- if eq $root.Values.model.source "init" }}
initContainers:
  - name: model
    image: {{ required "model.init.image is needed when model.source is init" $root.Values.model.init.image }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    {{- with $root.Values.model.init.command }}
    command:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $root.Values.model.init.args }}
    args:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    env:
      - name: COHORT_NEEDS
        value: {{ index . 1 }}
      {{- with $root.Values.model.init.env }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $root.Values.model.init.envFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- toYaml $root.Values.securityContext | nindent 6 }}
    volumeMounts:
      - name: model
        mountPath: {{ $root.Values.model.mountPath }}
{{- end }}
{{- end -}}

{{- /* A pause before the order to stop, by the kubelet itself: the image has no shell. */ -}}
{{- define "cohort.preStop" -}}
{{- $root := index . 0 -}}{{- $seconds := index . 1 | int -}}
{{- if and (gt $seconds 0) (semverCompare ">=1.30.0-0" $root.Capabilities.KubeVersion.Version) }}
lifecycle:
  preStop:
    sleep:
      seconds: {{ $seconds }}
{{- end }}
{{- end -}}

{{- /* Fields of every pod: a dict of root, part (the values of router or groups). */ -}}
{{- define "cohort.podCommon" -}}
serviceAccountName: {{ include "cohort.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .part.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* Pods of one part on different nodes and zones, where there are several. */ -}}
{{- define "cohort.spread" -}}
{{- if .part.topologySpread }}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "cohort.selector" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- end }}
{{- end -}}
